"""Images, captions and code stores as streams of batches."""
