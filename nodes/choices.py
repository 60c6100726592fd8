"""The host does not check a V3 combo's value: each node does it here, in validate_inputs."""

from collections.abc import Sequence


def check_choice(node: str, name: str, value: str | None, options: Sequence[str]) -> bool | str:
    """True, or the sentence that the host shows. A linked input arrives here as None; the pipeline sees its value."""
    if value is None or value in options:
        return True
    known = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"{node}: {name} must be one of {known}; got {str(value)[:80]!r}"
