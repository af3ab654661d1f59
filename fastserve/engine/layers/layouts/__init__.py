"""Weight layouts of linear layers: one file for each way to keep a weight."""
