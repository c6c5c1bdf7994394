"""Pieces that lowerings of the grouped-expert op share, and the dense form that every runtime takes."""
