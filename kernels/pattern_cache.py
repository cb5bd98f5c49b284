"""What kernels derived from a pattern, made again when it was written."""

from .derived import renew as invalidate

__all__ = ["invalidate"]
