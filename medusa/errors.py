"""What can go wrong, by name. Every message states the value, the limit and what to do."""


class MedusaError(Exception):
    """Base of the errors that this package raises on purpose; its message is written for the user."""


class BackboneError(MedusaError):
    """A backbone cannot be found, fetched, read or decoded with a tree."""


class CheckpointError(MedusaError):
    """A heads checkpoint is missing, damaged, foreign, or belongs to another backbone."""


class PromptError(MedusaError):
    """A prompt is empty, too long or malformed."""
