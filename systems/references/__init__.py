"""Image files of any origin as references: an object without its background."""

from systems.references.reference import Reference, read_reference

__all__ = ["Reference", "read_reference"]
