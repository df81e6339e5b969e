"""The penalty: measure the branches, ask the rule, act."""
