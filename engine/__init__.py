"""What makes the story fast and safe: open a module only to change what its first line says."""


class InputError(ValueError):
    """Something the user gave is not allowed. The message is one sentence: given, allowed, what to do."""


class Dropped(Exception):
    """This row cannot be trained on; the message is the reason, under which the Report counts it."""


def first_line(error):
    return next(iter(str(error).splitlines()), "") or type(error).__name__
