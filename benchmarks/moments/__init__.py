"""What do the moments cost beside `var_mean`, naive moments, CMD and Deep CORAL, and how exact are they?"""
