// The kernels of one instruction set.

#include "kernels.h"

#define QUIRE_NAME_OF(isa) #isa
#define QUIRE_NAME(isa) QUIRE_NAME_OF(isa)

namespace quire::QUIRE_ISA {

void attend(const AttentionArgs&);
void choose(const ChooseArgs&);
bool attend_chosen(const FetchArgs&);
void attend_packed(const PackedArgs&);
void rotate_append(const RotateArgs&);
void read_slots(const ReadArgs&);
void rms_norm(const NormArgs&);
void gate(const GateArgs&);
void dense(const ProductArgs&);
void int8(const ProductArgs&);
void grouped(const ProductArgs&);
void argmax(const float*, int64_t, int64_t, int64_t*);
void sample(const SampleArgs&);
void mask(const MaskArgs&);

extern const Kernels kernels;
const Kernels kernels = {QUIRE_NAME(QUIRE_ISA), attend, choose, attend_chosen, attend_packed, rotate_append,
                         read_slots, rms_norm, gate, dense, int8, grouped, argmax, sample, mask};

}  // namespace quire::QUIRE_ISA
