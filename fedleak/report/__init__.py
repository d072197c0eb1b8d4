"""``fedleak report``: what a run or an evaluation found, as one HTML file for who has to decide."""
