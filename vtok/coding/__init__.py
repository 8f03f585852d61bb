"""Videos as token ids and bits: `.vtok` files, how many tokens each block keeps, entropy coding, priors and draws."""
