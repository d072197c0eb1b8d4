"""What the gradient of the fully connected head gives: inputs, ``dL/dlogits`` and labels.

``single``: one image. ``informed``: one image under a known defence. ``equations``, ``batch``,
``factor``: the images of a batch told apart, also where the update was multiplied by a number.
``account``: what telling them apart shows of the client. ``labels``, ``stacked``: which labels
there were, of one update and of many.
"""
