"""The high-water mark of this process's resident memory, which can be reset."""

from pathlib import Path


class HostMemory:
    """`begin` when everything that does not count is in place."""

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _resident_bytes("VmRSS")

    def settle(self) -> None:
        """Nothing is under way when a call has returned."""

    def peak_bytes(self) -> int:
        """The most since `begin`, beyond what was there then."""
        return _resident_bytes("VmHWM") - self._before


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
