"""What a function raises that is still to be written; the tests report it as waiting, not as failed."""


class Todo(NotImplementedError):
    """`raise Todo("name")`: the function's name as the tests know it."""
