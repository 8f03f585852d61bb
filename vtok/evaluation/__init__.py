"""What `vtok eval` and `vtok compare` measure, the rows they write and the reports they draw."""
