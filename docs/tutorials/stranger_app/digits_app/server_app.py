"""The server: federated averaging."""

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits_app.task import Net, accuracy, load_data

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Measure the accuracy of the global model on images that no client has."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy(model, *load_data(-1))})


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    rounds = int(context.run_config["num-server-rounds"])
    learning_rate = float(context.run_config["learning-rate"])

    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord({"learning-rate": learning_rate}),
        evaluate_fn=evaluate,
    )
    final = {name: array.numpy() for name, array in result.arrays.items()}
    np.savez(str(context.run_config["save-to"]), **final)
