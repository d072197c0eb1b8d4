"""The network, the images of each client, and one local epoch."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

IMAGES = 8  # of one client


class Net(nn.Module):
    """One convolution and a fully connected layer, for 8x8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc = nn.Linear(6 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(x)).flatten(1))


def load_data(partition: int) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one client; partition -1 is the server's test set."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    mine = order[-500:] if partition < 0 else order[partition * IMAGES :][:IMAGES]
    images = torch.tensor(digits.images[mine] / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target[mine])


def train(model: nn.Module, images: Tensor, labels: Tensor, learning_rate: float) -> float:
    """Take one step of SGD on all images of the client; return the loss."""
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate)
    loss = F.cross_entropy(model(images), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that are classified rightly."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()
