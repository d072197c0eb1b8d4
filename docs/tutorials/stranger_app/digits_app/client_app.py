"""The client: trains on its own images and replies with its weights."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import Net, load_data, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    images, labels = load_data(int(context.node_config["partition-id"]))
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(model, images, labels, float(message.content["config"]["learning-rate"]))
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train-loss": loss, "num-examples": len(images)}),
        }
    )
    return Message(content=content, reply_to=message)
