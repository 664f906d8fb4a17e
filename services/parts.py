"""Installations without some of the parts, such as the images: what to say where a command needs one of these."""

_HOLDERS = {
    "services.trainer": "the image opd-trainer has it",
    "services.score_file": "the image opd-trainer has it",
    "testbed": "the image opd-trainer has it",
    "experiments": "a checkout of the repository has it",
    "benchmarks": "a checkout of the repository has it",
}
_EXTRAS = {
    "fastapi": "http",
    "uvicorn": "http",
    "torch": "models",
    "transformers": "models",
    "safetensors": "models",
    "datasets": "train",
    "math_verify": "train",
    "matplotlib": "train",
    "pyarrow": "train",
}


def missing_part(error: ModuleNotFoundError) -> str:
    """One line with the way out; raises `error` again where the module is none of a part's: that is a fault of ours."""
    name = error.name or ""
    for part, holder in _HOLDERS.items():
        if name == part or name.startswith(f"{part}."):
            return f"{part}: is not part of this installation; {holder}"
    extra = _EXTRAS.get(name.partition(".")[0])
    if extra is None:
        raise error
    return f"{name}: is not installed; install opd-services[{extra}], or use an image that has it"
