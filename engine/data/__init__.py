"""From files to windows of micro-batches: read -> rows -> encode -> windows, a file each, in this order."""
