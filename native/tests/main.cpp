#include "check.h"
#include "dwarfstar_native.h"

int main() {
    CHECK(ds_abi_version() == DS_ABI_VERSION);
    test_file();
    test_tap();
    test_codec();
    test_gate();
    test_rows();
    test_stage();
    test_stage_slots();
    std::puts("all native tests passed");
    return 0;
}
