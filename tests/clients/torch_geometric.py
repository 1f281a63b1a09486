"""torch_geometric: a classifier of graphs, around the package's GCN, with its own loader."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCN, global_mean_pool

from tests.clients.client import Client

SEEDS = {"train": 0, "val": 1, "test": 2, "far": 3}


class GraphClassifier(LightningModule):
    """A LightningModule for graph classification."""

    def __init__(self, hidden: int = 8, num_classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gnn = GCN(4, hidden, num_layers=2)
        self.classifier = torch.nn.Linear(hidden, num_classes)

    def forward(self, data: Batch) -> torch.Tensor:
        return self.classifier(global_mean_pool(self.gnn(data.x, data.edge_index), data.batch))

    def _step(self, data: Batch, stage: str) -> torch.Tensor:
        logits = self(data)
        loss = F.cross_entropy(logits, data.y)
        self.log(f"{stage}_loss", loss, batch_size=data.num_graphs)
        return loss

    def training_step(self, data: Batch, batch_idx: int) -> torch.Tensor:
        return self._step(data, "train")

    def validation_step(self, data: Batch, batch_idx: int) -> None:
        self._step(data, "val")

    def test_step(self, data: Batch, batch_idx: int) -> None:
        self._step(data, "test")

    def predict_step(self, data: Batch, batch_idx: int) -> torch.Tensor:
        return self(data).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loader(split: str) -> Any:
    generator = torch.Generator().manual_seed(SEEDS[split])
    graphs = []
    for i in range(14):
        nodes = 3 + i % 4
        x = torch.randn(nodes, 4, generator=generator) * (20 if split == "far" else 1)
        x[:, i % 3] += 1
        graphs.append(Data(x=x, edge_index=torch.combinations(torch.arange(nodes)).T, y=torch.tensor([i % 3])))
    return DataLoader(graphs, batch_size=5)


CLIENTS = [
    Client(
        "torch_geometric GCN",
        "one class per graph",
        ["torch-geometric"],
        GraphClassifier,
        loader,
        target_of=lambda batch: batch.y,
        input_of=lambda batch: batch,
    ),
]
