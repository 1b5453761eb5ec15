// One instruction set's table of kernels. Compiled once per set; see vector.h for why nothing here is shared.
#include "kernels.h"

#include "attention.h"
#include "dot.h"
#include "fp8.h"
#include "gemm.h"
#include "panel.h"
#include "rows.h"
#include "select.h"
#include "vector.h"

#define FH_JOIN2(a, b) a##b
#define FH_JOIN(a, b) FH_JOIN2(a, b)
#define FH_TEXT2(a) #a
#define FH_TEXT(a) FH_TEXT2(a)

namespace freehold {

extern const Kernels FH_JOIN(kernels_, FH_ISA);
const Kernels FH_JOIN(kernels_, FH_ISA) = {
    FH_TEXT(FH_ISA), W, ::kTile, ::product, ::gated, ::gemm, ::gemm_gated, ::combine, ::accumulate, ::attend, ::merge, ::finish,
    ::score,         ::keep,  ::quantise, ::widen_latent, ::norm, ::rope, ::route,
};

}  // namespace freehold
