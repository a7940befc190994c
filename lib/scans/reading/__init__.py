"""What a folder of scans holds: files to cases, cases to a store of images that are all alike."""
