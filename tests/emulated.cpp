// The kernels as a program that another processor runs, emulated: emulated.py lends it memory, call by call.
#include <cstdint>
#include <cstdio>

extern "C" {
const char* dsv2_path();
void dsv2_linear(), dsv2_mlp(), dsv2_attention(), dsv2_layers(), dsv2_pack(), dsv2_read();
}
typedef int64_t Any;  // a number, or an address in `room`
typedef void Function(Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any, Any);

alignas(64) static char room[1 << 28];

int main() {
  void (*const functions[])() = {dsv2_linear, dsv2_mlp, dsv2_attention, dsv2_layers, dsv2_pack, dsv2_read};
  printf("%s\n%lld\n", dsv2_path(), (long long)room);
  fflush(stdout);
  Any size, function, a[12];
  while (fread(&size, 8, 1, stdin) && fread(&function, 8, 1, stdin) && fread(a, 8, 12, stdin) == 12) {
    if (size > (Any)sizeof(room) || (Any)fread(room, 1, size, stdin) != size) return 1;
    auto* const call = (Function*)functions[function];
    call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
    fwrite(room, 1, size, stdout);
    fflush(stdout);
  }
}
