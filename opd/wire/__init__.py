"""Arrays to bytes and records to protobuf; the only place, with `opd.rpc`, where protobuf is seen."""
