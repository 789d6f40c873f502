"""What the writing recipes share: records, resumable output, and the rubric writer."""
