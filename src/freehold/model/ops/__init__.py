"""The operations a layer is made of, behind one interface with a slow twin and fast ones."""
