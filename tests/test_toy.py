"The models that many notebooks start from, made before them: `toy_setup` is kept in the cache"


def test_the_toy_setup_is_made_and_read_again():
    "[fails when the second call trains anew]"
    from mpo_nb.reward import toy_setup
    first, again = toy_setup(), toy_setup()
    assert first.seconds == again.seconds > 0
    assert all((a == b).all() for a, b in zip(first.sft.parameters(), again.sft.parameters()))
