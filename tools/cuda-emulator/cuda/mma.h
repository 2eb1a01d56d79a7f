// wmma
