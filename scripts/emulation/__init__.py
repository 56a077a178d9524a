"""The stages of exact tables, cut short, on this machine's CPU and on emulated ones: are all bytes equal?"""
