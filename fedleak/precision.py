"""How exact what a float32 client sends is: each level with where it comes from.

float32 has 24 bits: the nearest number is within :data:`UNIT` of any other, relative to it. What
a client sends has passed many roundings, which add up like a random walk. The levels below are
standard deviations, measured as the difference to the same computation in float64.
"""

from __future__ import annotations

#: Largest relative error of one rounding to float32, ``2^-24``. A whole gradient is known no
#: better: the predicted PSNR takes it for every tensor, relative to its root mean square.
UNIT = 6e-8
#: Standard deviation of one rounding, relative to the result: evenly within half a unit in the
#: last place, between ``2^-25`` and ``2^-24`` of it, so between 1.7e-8 and 3.4e-8.
HALF = 3e-8
#: Distance of 1 from the next float32 above it, ``2^-23``.
SPACING = 1.2e-7
#: Of derivatives that are themselves taken in float32, through a whole network, relative to a
#: tensor's root mean square: what is left of 24 bits after some hundred terms of either sign.
DERIVATIVE = 1e-5
#: Of a layer's output after a forward pass, relative to it and half to its root mean square:
#: about two roundings, measured on the paper's networks.
FORWARD = 1.1e-7
#: Of a weight's gradient, relative to its root mean square. It sums over all positions, and
#: its cotangents have passed the backward pass too: about three times a forward pass's.
GRADIENT = 3 * FORWARD
#: The same of a fully connected head, whose gradient is one product of two factors for each
#: entry; an attacker who knows the defence has no other noise to estimate it from.
HEAD_GRADIENT = 3e-7
#: Of an entry of a head's gradient over a batch, relative to the root mean square: measured on
#: batches of 2 to 32, which average over their images.
ENTRY = 1e-7
#: Of a client's softmax, for logits of about 1: its exponentials and their sum are rounded, and
#: so are the logits, by their size. Measured like :data:`ENTRY`.
SOFTMAX = 4e-7
#: What that may come to in all of a softmax's entries together: a difference below it is none.
SOFTMAX_MOST = 5e-7
#: Noise of a head's gradient, relative to an entry, above which it is more than rounding: five
#: times :data:`ENTRY`.
NOISY = 5e-7
#: Of a float32 weight after a step, relative to the weight: one rounding of the sum, 3.4e-8 at
#: most (see :data:`HALF`), and a little for that of the step itself.
WEIGHT = 4e-8
#: Of a first step of Adam, relative to it: a square, a root, a sum and a quotient, rounded each.
ADAM_STEP = 1.5e-7
