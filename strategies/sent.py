"""What each client was sent in a round: kept once, for everybody who judges what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ArrayRecord, Message


class Sent(Mapping[int, ArrayRecord]):
    """The arrays that each node was sent, in the order the nodes were asked.

    Messages mostly share one record, and so do the nodes here: it is kept once. Nodes that
    were sent no arrays are left out.

    Parameters
    ----------
    messages : iterable of Message
        As they leave for the clients.

    Attributes
    ----------
    configs : dict
        What each node was told beside it, by name.
    """

    def __init__(self, messages: Iterable[Message] = ()):
        self._records: dict[int, ArrayRecord] = {}
        self.configs: dict[int, dict[str, object]] = {}
        copies: dict[int, ArrayRecord] = {}
        for message in messages:
            record = next(iter(message.content.array_records.values()), None)
            if record is not None:
                # Copied: strategies may go on with the records that they send.
                if id(record) not in copies:
                    copies[id(record)] = ArrayRecord(dict(record.items()))
                node = message.metadata.dst_node_id
                self._records[node] = copies[id(record)]
                self.configs[node] = {
                    k: v for c in message.content.config_records.values() for k, v in c.items()
                }

    def __getitem__(self, node: int) -> ArrayRecord:
        return self._records[node]

    def __iter__(self) -> Iterator[int]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def usual(self) -> ArrayRecord | None:
        """What most nodes were sent; of equally many the first. None if nothing was sent."""
        counts = Counter(map(id, self._records.values()))
        return max(self._records.values(), key=lambda record: counts[id(record)], default=None)
