/* Whatever the compiler's own target has: NEON on 64-bit ARM, SSE2 on x86. */
#define TARGET plain
#define BF16 0
#include "target.h"
