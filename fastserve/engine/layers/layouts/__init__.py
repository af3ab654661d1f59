"""Weight layouts of linear layers, one file for each."""
