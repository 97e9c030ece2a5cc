"""`est-ds doctor`: checks every node, side by side, before a run is started on them."""
