"""x."""
def write_report(root, config, images, summary, runs):
    return root
