"""Keys for a trained network's heads, from images: which heads need none of the input, and what their keys are."""
