"""Reads the figures in CRIU's statistics files: a magic, then one protobuf record whose times are in microseconds."""

FREEZING, FROZEN = 1, 2  # dump_stats_entry's fields


def fields(path):
    """The numeric fields of the first message in a statistics file; none where the file isn't there."""
    try:
        data = path.read_bytes()[12:]
    except OSError:
        return {}

    def varint(at):
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
            if data[at - 1] < 0x80:
                return value, at

    found = {}
    try:
        _, at = varint(0)
        length, at = varint(at)
        end = at + length
        while at < end:
            key, at = varint(at)
            if key & 7:
                break
            found[key >> 3], at = varint(at)
    except IndexError:
        pass
    return found


def freeze_ms(*directories):
    """How long the container stood still: time to freeze it and time frozen. None where nobody says."""
    for directory in directories:
        found = fields(directory / "stats-dump")
        if FROZEN in found:
            return (found.get(FREEZING, 0) + found[FROZEN]) / 1000
    return None
