"""The error that both ways of storing share."""


class ImageError(Exception):
    """A refusal. `status`, `type` and `detail` are those of the server's problem, also where the module itself refuses."""

    def __init__(self, status: int, type: str, detail: str) -> None:
        super().__init__(status, type, detail)
        self.status, self.type, self.detail = status, type, detail

    def __str__(self) -> str:
        return f"{self.detail} ({self.status} {self.type})"
