"""What a data set is, what is wrong with it and what to do about it: pure functions over samples and their facts."""
