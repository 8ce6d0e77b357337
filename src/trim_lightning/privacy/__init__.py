"""What may leave this machine: keys never, paths only by name."""

from trim_lightning.privacy.keys import LogFormatter

__all__ = ["LogFormatter"]  # named in logging configs, ours and other people's
