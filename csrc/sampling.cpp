#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "scratch.h"

namespace tramontane {
namespace {

// Weights are relative to the highest. Few tokens are heavy, and nearly always they decide the draw, or those do that
// are not quite light.
constexpr float HEAVY = 0x1p-11f, LIGHT = 0x1p-25f, NOTHING = std::numeric_limits<float>::denorm_min();

// The tokens of a row that weigh at least `floor`, in descending order of logit, lower ids first among equals, without
// sorting them all.
//
// Tokens are counted into buckets by their distance from the highest logit, so that the token at which a count or a
// mass is reached lies in a known bucket. What is in that one is counted into buckets again, by the bits of the logits,
// until few are left to be sorted.
class Ranking {
   public:
    struct Place {
        int32_t token;
        double before, mass;  // of the tokens up to this one, without it and with it
        int64_t count;        // the same, with it
    };
    struct Share {
        int64_t count;
        double mass;

        Share& operator+=(const Share& other) {
            count += other.count;
            mass += other.mass;
            return *this;
        }
    };

    // Room for a ranking of `size` tokens, in floats.
    static int64_t room(int64_t size) { return 2 * size + (size + 1) / 2; }

    Ranking(const float* scaled, const float* weights, float* room, int64_t size, float highest, float floor)
        : scaled_(scaled),
          weights_(weights),
          tokens_(reinterpret_cast<int32_t*>(room)),
          chosen_(tokens_ + size),
          buckets_(reinterpret_cast<uint16_t*>(chosen_ + size)) {
        count_ = keep(tokens_, size, [=](int64_t i) { return static_cast<int32_t>(i); },
                      [=](int32_t i) { return weights[i] >= floor; });
        const float buckets_a_unit = (BUCKETS - 1) / -std::log(floor);
        for (int64_t n = 0; n < count_; n++) {
            const int32_t i = tokens_[n];
            const int b = static_cast<int>(std::min((highest - scaled[i]) * buckets_a_unit, BUCKETS - 1.0f));
            buckets_[n] = static_cast<uint16_t>(b);
            shares_[b] += {1, weights[i]};
        }
    }

    // The first token at which reached(count, mass) of the tokens so far; none where it never is.
    template <class Reached>
    std::optional<Place> first(Reached reached) const {
        Share sum{0, 0};
        for (int b = 0; b < BUCKETS; b++) {
            if (shares_[b].count > 0 && reached(sum.count + shares_[b].count, sum.mass + shares_[b].mass)) {
                const int64_t count = keep(chosen_, count_, [&](int64_t n) { return tokens_[n]; },
                                           [&, n = int64_t{0}](int32_t) mutable { return buckets_[n++] == b; });
                return first_chosen(count, sum, reached);
            }
            sum += shares_[b];
        }
        return std::nullopt;
    }

    template <class Kept>
    Share share(Kept kept) const {
        Share share{0, 0};
        for (int64_t n = 0; n < count_; n++)
            if (kept(tokens_[n])) share += {1, weights_[tokens_[n]]};
        return share;
    }

   private:
    static constexpr int BUCKETS = 1024, FEW = 64;

    // Writes those of `count` tokens that are kept, in their order, and returns how many they are.
    template <class Token, class Kept>
    static int64_t keep(int32_t* out, int64_t count, Token token, Kept kept) {
        int64_t n = 0;
        for (int64_t i = 0; i < count; i++) {
            const int32_t one = token(i);
            out[n] = one;
            n += kept(one);
        }
        return n;
    }

    // Bits in the order of logits, from the highest on.
    uint32_t key(int32_t token) const {
        const float logit = scaled_[token] + 0.0f;  // one zero, not two
        uint32_t bits;
        memcpy(&bits, &logit, 4);
        return bits >> 31 ? bits : ~bits & 0x7fffffff;
    }

    // The same among the first `count` of chosen_, where `sum` is before them all; the last where sums in another order
    // round below.
    template <class Reached>
    Place first_chosen(int64_t count, Share sum, Reached reached) const {
        uint32_t low = 0, high = ~uint32_t{0};
        while (count > FEW && low < high) {
            low = ~uint32_t{0}, high = 0;
            for (int64_t n = 0; n < count; n++) {
                const uint32_t k = key(chosen_[n]);
                low = std::min(low, k), high = std::max(high, k);
            }
            int shift = 0;
            while ((high - low) >> shift >= BUCKETS) shift++;
            std::array<Share, BUCKETS> shares{};
            for (int64_t n = 0; n < count; n++) shares[(key(chosen_[n]) - low) >> shift] += {1, weights_[chosen_[n]]};
            const int last = static_cast<int>((high - low) >> shift);
            int b = 0;
            while (b < last && !(shares[b].count > 0 && reached(sum.count + shares[b].count, sum.mass + shares[b].mass)))
                sum += shares[b++];
            count = keep(chosen_, count, [&](int64_t n) { return chosen_[n]; },
                         [&](int32_t token) { return static_cast<int>((key(token) - low) >> shift) == b; });
        }
        if (low < high)
            std::stable_sort(chosen_, chosen_ + count, [&](int32_t i, int32_t j) { return scaled_[i] > scaled_[j]; });
        Place place{0, sum.mass, sum.mass, sum.count};
        for (int64_t n = 0; n < count; n++) {
            place = {chosen_[n], place.mass, place.mass + weights_[chosen_[n]], place.count + 1};
            if (reached(place.count, place.mass)) break;
        }
        return place;
    }

    const float* scaled_;
    const float* weights_;
    int32_t* tokens_;  // in ascending order
    int32_t* chosen_;
    uint16_t* buckets_;  // of tokens_
    int64_t count_;
    std::array<Share, BUCKETS> shares_{};
};

// The draw, where the tokens that weigh at least `floor` decide it. `mass` is that of the whole row; among all of its
// tokens it is summed as they are, so that a share of it below one is always reached.
std::optional<int32_t> draw(const float* scaled, const float* weights, float* room, int64_t size, float highest,
                            float floor, double mass, const Sampling& how) {
    const Ranking ranking(scaled, weights, room, size, highest, floor);
    if (floor == NOTHING) mass = ranking.share([](int32_t) { return true; }).mass;
    // These cuts keep a prefix of the order, so its size and mass are all that the draw needs.
    int64_t kept = size;
    if (how.top_k > 0 && how.top_k < size) {
        const auto last = ranking.first([&](int64_t count, double) { return count >= how.top_k; });
        if (last) {
            const auto share = ranking.share([&](int32_t i) { return scaled[i] >= scaled[last->token]; });
            kept = share.count;
            mass = share.mass;
        }
        if (!last && floor > NOTHING) return std::nullopt;
    }
    if (how.top_p < 1) {
        const auto last = ranking.first([&](int64_t, double sum) { return sum >= how.top_p * mass; });
        if (!last) return std::nullopt;
        kept = last->count;
        mass = last->mass;
    }
    if (how.min_p > 0) {
        if (how.min_p < floor) return std::nullopt;
        const auto share = ranking.share([&](int32_t i) { return weights[i] >= how.min_p; });
        kept = std::min(kept, share.count);
        mass = std::min(mass, share.mass);
    }
    double skipped = 0;
    if (how.xtc_threshold < 1) {
        const float least = std::max(static_cast<float>(how.xtc_threshold * mass), NOTHING);
        if (least < floor) return std::nullopt;
        const int64_t top = std::min(kept, ranking.share([&](int32_t i) { return weights[i] >= least; }).count);
        if (top > 1) skipped = ranking.first([&](int64_t count, double) { return count >= top; })->before;
    }
    const double wanted = skipped + how.uniform * (mass - skipped);
    const auto token = ranking.first([&](int64_t, double sum) { return sum > wanted; });
    return token ? std::optional(token->token) : std::nullopt;
}

// The weights of all but the typical tokens become nothing; those of the others, and `mass`, relative to the highest of
// them, which is returned. `top_k` has its effect before.
float keep_typical(const float* scaled, float* weights, float* nearness, float* room, int64_t size, float highest,
                   double& mass, const Sampling& how) {
    if (how.top_k > 0 && how.top_k < size) {
        const Ranking ranking(scaled, weights, room, size, highest, NOTHING);
        if (const auto last = ranking.first([&](int64_t count, double) { return count >= how.top_k; }))
            for (int64_t i = 0; i < size; i++)
                if (scaled[i] < scaled[last->token]) weights[i] = 0;
    }
    // The information of a token, but for a constant, is its distance from the highest.
    double whole = 0, expected = 0;
    for (int64_t i = 0; i < size; i++)
        if (weights[i] >= NOTHING) {
            whole += weights[i];
            expected += weights[i] * static_cast<double>(highest - scaled[i]);
        }
    expected /= whole;
    for (int64_t i = 0; i < size; i++)
        nearness[i] = -static_cast<float>(std::abs(static_cast<double>(highest - scaled[i]) - expected));
    const Ranking ranking(nearness, weights, room, size, 0, NOTHING);
    const auto last = ranking.first([&](int64_t, double sum) { return sum >= how.typical_p * whole; });
    const float least = last ? nearness[last->token] : -std::numeric_limits<float>::infinity();
    int64_t best = -1;
    for (int64_t i = 0; i < size; i++) {
        if (nearness[i] < least) weights[i] = 0;
        if (weights[i] >= NOTHING && (best < 0 || scaled[i] > scaled[best])) best = i;
    }
    if (best < 0) return highest;
    mass = 0;
    const float unit = weights[best];
    for (int64_t i = 0; i < size; i++) mass += weights[i] /= unit;
    return scaled[best];
}

}  // namespace

int32_t sample(const Kernels& kernels, const float* logits, int64_t vocabulary, const Sampling& how) {
    if (how.temperature != 0) {
        const bool typical = how.typical_p < 1;
        float* scaled = scratch(Scratch::PIECE, (typical ? 3 : 2) * vocabulary + Ranking::room(vocabulary));
        float* weights = scaled + vocabulary;
        float* room = weights + vocabulary;
        double mass = 0;
        float highest = kernels.softmax_weights(scaled, weights, &mass, logits, vocabulary, how.temperature);
        Sampling left = how;
        if (typical) {
            float* nearness = room + Ranking::room(vocabulary);
            highest = keep_typical(scaled, weights, nearness, room, vocabulary, highest, mass, how);
            left.top_k = 0;
        }
        for (float floor : {HEAVY, LIGHT, NOTHING})
            if (const auto token = draw(scaled, weights, room, vocabulary, highest, floor, mass, left)) return *token;
    }
    return static_cast<int32_t>(kernels.argmax(logits, vocabulary));  // also of what is infinite or not a number
}

}  // namespace tramontane
