"""SAMIS: which training examples does a network memorise?"""
