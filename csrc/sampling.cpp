#include "sampling.h"

#include <algorithm>
#include <array>
#include <vector>

#include "scratch.h"

namespace tramontane {
namespace {

// The tokens of a row in descending order of logit, lower ids first among equals, without sorting them all.
//
// Tokens are counted into buckets by their distance from the highest logit, so that the token at which a count or a
// mass is reached lies in a known bucket, and only that one is sorted. Tokens of no weight do not take part.
class Ranking {
   public:
    struct Place {
        int32_t token;
        double mass;  // of the tokens up to this one, included
    };

    Ranking(const float* scaled, const float* weights, int64_t size, float highest)
        : scaled_(scaled), weights_(weights), buckets_(size) {
        for (int64_t i = 0; i < size; i++) {
            buckets_[i] = BUCKETS;
            if (!(weights[i] > 0)) continue;
            const int b = static_cast<int>(std::min((highest - scaled[i]) * BUCKETS_A_UNIT, BUCKETS - 1.0f));
            buckets_[i] = static_cast<uint16_t>(b);
            counts_[b]++;
            masses_[b] += weights[i];
            count_++;
        }
    }

    int64_t count() const { return count_; }

    // The first token at which reached(count, mass) of the tokens so far; the last one where it never is.
    template <class Reached>
    Place first(Reached reached) const {
        Place place{0, 0};
        int64_t count = 0;
        for (int b = 0; b < BUCKETS; b++) {
            if (counts_[b] == 0) continue;
            if (!reached(count + counts_[b], place.mass + masses_[b]) && count + counts_[b] < count_) {
                count += counts_[b];
                place.mass += masses_[b];
                continue;
            }
            for (int32_t token : sorted(b)) {
                place = {token, place.mass + weights_[token]};
                if (reached(++count, place.mass)) return place;
            }
        }
        return place;
    }

    template <class Kept>
    double mass(Kept kept) const {
        double mass = 0;
        for (size_t i = 0; i < buckets_.size(); i++)
            if (buckets_[i] < BUCKETS && kept(i)) mass += weights_[i];
        return mass;
    }

   private:
    static constexpr int BUCKETS = 1024;
    static constexpr float BUCKETS_A_UNIT = 16;  // of logit; those more than 64 units below the highest share the last

    std::vector<int32_t> sorted(int b) const {
        std::vector<int32_t> tokens;
        tokens.reserve(counts_[b]);
        for (size_t i = 0; i < buckets_.size(); i++)
            if (buckets_[i] == b) tokens.push_back(static_cast<int32_t>(i));
        std::stable_sort(tokens.begin(), tokens.end(), [&](int32_t i, int32_t j) { return scaled_[i] > scaled_[j]; });
        return tokens;
    }

    const float* scaled_;
    const float* weights_;
    std::vector<uint16_t> buckets_;
    std::array<int64_t, BUCKETS> counts_{};
    std::array<double, BUCKETS> masses_{};
    int64_t count_ = 0;
};

}  // namespace

int32_t sample(const Kernels& kernels, const float* logits, int64_t vocabulary, const Sampling& how) {
    const auto greedy = [&] { return static_cast<int32_t>(kernels.argmax(logits, vocabulary)); };
    if (how.temperature == 0) return greedy();
    float* scaled = scratch(Scratch::PIECE, 2 * vocabulary);
    float* weights = scaled + vocabulary;
    const float highest = kernels.softmax_weights(scaled, weights, logits, vocabulary, how.temperature);
    const Ranking ranking(scaled, weights, vocabulary, highest);
    if (ranking.count() == 0) return greedy();  // infinite, or not numbers

    // Every cut keeps a prefix of the order, so the mass it leaves is all that the draw needs.
    double mass = ranking.mass([](size_t) { return true; });
    if (how.top_k > 0 && how.top_k < ranking.count()) {
        const float edge = scaled[ranking.first([&](int64_t count, double) { return count >= how.top_k; }).token];
        mass = ranking.mass([&](size_t i) { return scaled[i] >= edge; });
    }
    if (how.top_p < 1) {
        const double wanted = how.top_p * mass;
        mass = ranking.first([&](int64_t, double sum) { return sum >= wanted; }).mass;
    }
    if (how.min_p > 0) {
        mass = std::min(mass, ranking.mass([&](size_t i) { return weights[i] >= how.min_p; }));
    }
    const double wanted = how.uniform * mass;
    return ranking.first([&](int64_t, double sum) { return sum > wanted; }).token;
}

}  // namespace tramontane
