"""What tests of programs need: a loop that is stepped, and a look at what is left."""
