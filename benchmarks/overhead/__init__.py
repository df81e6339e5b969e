"""What does the penalty cost beside clipping and beside other ways to balance?"""
