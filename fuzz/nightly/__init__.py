"""Nights: every target × kernel × device under one budget, remembered in a store.

`night` drives one: it hands tasks (`tasks`) to lanes, the places where one job runs at a time, of this machine
(`local`) or of a Ray cluster (`cluster`). `schedule` says who gets the next slice of time, `config` what the user
asked for, `statistics` and `coverage` what is counted.
"""
