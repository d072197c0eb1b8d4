"""What candidate images must reproduce, as residuals and their expected errors.

``base``: gradients, of chains and of any module. ``whole_update``: one image's update under known
noise. ``shared_rows``: batches whose first layer is open. ``local_training``: several local steps.
``statistics``: those of batch normalisation. ``rounds``: several rounds of one client.
"""
