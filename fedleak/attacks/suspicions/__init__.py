"""What an update shows of its client that is not what was declared: seen, said, and used.

One function for each thing that can be seen. What is modelled once it is seen (a factor, a sign,
weights in the place of a gradient) is a *note*, and the attack goes on with it; what is not is a
*doubt*, and the reconstruction is ``doubtful``.
"""

from fedleak.attacks.suspicions.head import far_fewer, one_image
from fedleak.attacks.suspicions.replies import alike, mistaken
from fedleak.attacks.suspicions.seen import Seen, by_factor

__all__ = ["Seen", "alike", "by_factor", "far_fewer", "mistaken", "one_image"]
