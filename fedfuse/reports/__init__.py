"""What a run folder says, as pictures and pages. No torch: a report opens anywhere."""
