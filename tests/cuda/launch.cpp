// Launches of kernels on the emulator: each request names a kernel, the shape of the launch and the arguments, each answer holds the
// arrays as the kernel left them. Arguments that are not of the kernel's own types end the program. The kernels are
// included, and their table (kernels.inc) written, by src/op/cuda/emulated.rs, which speaks to this.
#include "emulator.h"

#include <string>
#include <tuple>

struct Argument {
    std::string kind; // of an array the type of its entries, else that of the scalar, or "null"
    bool is_array = false;
    uint64_t bits = 0; // of a scalar
    size_t skew = 0, bytes = 0;
    std::unique_ptr<char[]> memory; // of exactly the array's size: the sanitizer sees its bounds

    void* at() const { return memory.get() + skew; }
};

struct Request {
    std::string kernel;
    dim3 grid;
    unsigned threads;
    size_t shared;
    std::vector<Argument> arguments;
};

struct Kernel {
    const char* name;
    void (*call)(const Request&);
};

[[noreturn]] static void refuse(const Request& request, size_t at, const std::string& why) {
    fprintf(stderr, "emulator: %s, argument %zu: %s\n", request.kernel.c_str(), at, why.c_str());
    exit(1);
}

template <class T> const char* name_of();
template <> const char* name_of<float>() { return "f32"; }
template <> const char* name_of<double>() { return "f64"; }
template <> const char* name_of<__nv_bfloat16>() { return "bf16"; }
template <> const char* name_of<uint32_t>() { return "u32"; }
template <> const char* name_of<uint8_t>() { return "u8"; }

/// Argument `at` as a kernel's parameter.
template <class P> P take(const Request& request, size_t at) {
    const Argument& argument = request.arguments[at];
    if constexpr (std::is_pointer_v<P>) {
        using Entry = std::remove_const_t<std::remove_pointer_t<P>>;
        if (argument.kind == "null") return nullptr;
        if (argument.kind != name_of<Entry>()) refuse(request, at, argument.kind + " for a pointer to " + name_of<Entry>());
        return static_cast<P>(argument.at());
    } else {
        const char* wanted = std::is_same_v<P, int> ? "int" : std::is_same_v<P, long long> ? "long long" : "float";
        static_assert(std::is_same_v<P, int> || std::is_same_v<P, long long> || std::is_same_v<P, float>);
        if (argument.kind != wanted) refuse(request, at, argument.kind + " for " + wanted);
        if constexpr (std::is_same_v<P, float>) return emu::bits<float>(uint32_t(argument.bits));
        else return P(argument.bits);
    }
}

template <class... P, size_t... AT> void launch(void (*kernel)(P...), const Request& request, std::index_sequence<AT...>) {
    if (request.arguments.size() != sizeof...(P))
        refuse(request, request.arguments.size(), "the last of " + std::to_string(sizeof...(P)));
    const std::tuple<P...> parameters{take<P>(request, AT)...};
    emu::launch(request.grid, request.threads, request.shared, [&] { std::apply(kernel, parameters); });
}
template <class... P> void launch(void (*kernel)(P...), const Request& request) {
    launch(kernel, request, std::index_sequence_for<P...>());
}
template <auto KERNEL> void call(const Request& request) { launch(KERNEL, request); }

#include "kernels.inc"

static void read(void* to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0); // no further request
}
static uint64_t read_number() {
    uint64_t number;
    read(&number, sizeof number);
    return number;
}
static std::string read_text() {
    std::string text(read_number(), ' ');
    read(text.data(), text.size());
    return text;
}

static Request read_request() {
    Request request;
    request.kernel = read_text();
    uint64_t grid[3];
    for (uint64_t& n : grid) n = read_number();
    request.grid = dim3(grid[0], grid[1], grid[2]);
    request.threads = unsigned(read_number());
    request.shared = read_number();
    request.arguments.resize(read_number());
    for (Argument& argument : request.arguments) {
        argument.kind = read_text();
        argument.is_array = argument.kind != "null" && argument.kind != "int" && argument.kind != "long long" && argument.kind != "float";
        if (!argument.is_array) {
            argument.bits = read_number();
            continue;
        }
        argument.skew = read_number();
        argument.bytes = read_number();
        argument.memory.reset(new char[argument.skew + argument.bytes]);
        read(argument.at(), argument.bytes);
    }
    return request;
}

int main() {
    for (;;) {
        const Request request = read_request();
        const Kernel* found = nullptr;
        for (const Kernel& kernel : KERNELS)
            if (request.kernel == kernel.name) found = &kernel;
        if (!found) refuse(request, 0, "there is no such kernel");
        found->call(request);
        for (const Argument& argument : request.arguments)
            if (argument.is_array) fwrite(argument.at(), 1, argument.bytes, stdout);
        fflush(stdout);
    }
}
