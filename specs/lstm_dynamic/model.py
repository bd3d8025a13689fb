"""An LSTM that reads a digit row by row."""

from torch import Tensor, nn


class RowReader(nn.Module):
    """Two stacked LSTMs over the rows of an image, and a classifier of the last state."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows `[batch, rows, 8]` to class logits `[batch, classes]`."""
        _, (hidden, _) = self.lstm(x)
        return self.head(hidden[-1])


def row_reader(width: int = 96, classes: int = 10) -> nn.Module:
    """Build the untrained network (116,170 parameters by default); its weights are beside it."""
    return RowReader(width, classes)
