// The whole test framework: EXPECT counts failures and says where; a test program returns their number.
#pragma once

#include <cstdio>

static int failures = 0;

#define EXPECT(CONDITION, ...)                                              \
  do {                                                                      \
    if (!(CONDITION)) {                                                     \
      ++failures;                                                           \
      std::printf("%s:%d: not true: %s: ", __FILE__, __LINE__, #CONDITION); \
      std::printf(" " __VA_ARGS__);                                         \
      std::printf("\n");                                                    \
    }                                                                       \
  } while (false)
